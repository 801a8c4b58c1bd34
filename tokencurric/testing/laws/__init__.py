"""The laws, a file for each kind of error."""
