"""Result files, and the figures, tables and charts made from them."""
