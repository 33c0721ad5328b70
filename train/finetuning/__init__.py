"""Fine-tuning of encoders on tasks, and of LLaMAs on conversations."""
