"""Conversations: formats of rows, chat templates, tokens that the loss counts."""
