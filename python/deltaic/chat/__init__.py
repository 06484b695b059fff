"""From messages, text and pictures to what the model takes: token ids, pixels and positions; and from token ids back
to text."""
