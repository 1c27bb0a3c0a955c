"""An HTTP server that speaks OpenAI's protocol in front of an engine; needs the extra ``serve``."""
