"""Models trained for real tasks: the rows of docs/results.md, their runs, and the page made of the records."""
