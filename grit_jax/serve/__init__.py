"""One process that searches and writes: an HTTP server for one model, with OpenAI's interface."""
