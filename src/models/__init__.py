"""Networks and their training: a file per model, and what they share."""
