"""The main job: from the docstrings on this machine to a model that searches and writes."""
