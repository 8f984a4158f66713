"""What differs between tasks: how a model is evaluated, exported and called."""
