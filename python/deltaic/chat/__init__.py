"""From messages, text and pictures to what the model takes: token ids, pixels and positions; and from token ids back
to text.

prompt              the one door: anything a user gives becomes a Prompt
template, sandbox   messages become text
tokenizer, prepared text becomes token ids, and they become text
image_source, resize, image  pictures become patches
files               where these things come from
"""
