"""One process that searches and writes: an HTTP server of one model, with the interface of OpenAI."""
