"""A model that embeds, generates and scores."""
