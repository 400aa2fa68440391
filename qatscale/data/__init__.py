"""Text to token shards (`prepare`), and token shards to batches (`reader`)."""
