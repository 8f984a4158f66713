"""How raw archives are had: downloaded, or taken from the user."""
