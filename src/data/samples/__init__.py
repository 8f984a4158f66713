"""Embedded samples, one module each: `draw(archive)` writes one offline, in the official archive format."""
