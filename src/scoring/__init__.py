"""Networks that judge what other networks make."""
