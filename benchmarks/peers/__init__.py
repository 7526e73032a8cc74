"""The providers of each kind of call, ours and other libraries', by the names of the rows."""
