"""What an experiment shows: pictures, tables and the model card, as pure functions of arrays and rows."""
