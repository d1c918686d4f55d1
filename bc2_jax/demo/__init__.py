"""The whole life of a model in one command: from raw text to a served chat model, and the report of it."""
