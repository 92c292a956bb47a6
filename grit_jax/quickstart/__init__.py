"""The quickstart: from the docstrings on this machine to a model that searches and writes."""
