"""What a layout would hold and send, on paper: an optimizer step replayed tensor by tensor, without torch."""
