"""The claims of reproducibility, proved one by one."""
