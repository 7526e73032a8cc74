"""Models as a service: an engine that runs many requests at once, and an HTTP API of OpenAI's and vLLM's forms."""
