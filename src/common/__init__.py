"""What every room may use: errors, files, git, hardware, identities."""
