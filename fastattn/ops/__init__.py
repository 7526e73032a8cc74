"""The public functions, one op to a file, each with the op's registration."""
