"""Networks and distances that judge what other networks make."""
