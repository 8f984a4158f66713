"""What a configuration may say: schema, composing, refusing."""
