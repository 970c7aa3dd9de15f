"""Raw text to shards. Training never imports this."""
