"""Descriptions, a file for each kind of data of the same name in src/data/kinds/."""
