"""Fine-tuning of encoders: rows, labels, batches, metrics, the run, predictions."""
