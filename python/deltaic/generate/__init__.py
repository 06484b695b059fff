"""From logits to text: choosing tokens, deciding when to stop, and the loop that ties model, sampler and text
together."""
