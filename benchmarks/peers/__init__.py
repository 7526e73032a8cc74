"""The implementations of a call that are measured side by side, ours and others', by the names of the rows."""
