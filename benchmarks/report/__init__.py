"""Result files, and the figures, tables and charts made of them."""
