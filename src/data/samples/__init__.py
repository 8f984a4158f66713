"""The embedded samples, drawn or picked offline in the official archive formats."""
