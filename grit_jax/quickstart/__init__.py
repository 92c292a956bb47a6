"""The quickstart: trains a model that searches and writes on this machine's docstrings."""
