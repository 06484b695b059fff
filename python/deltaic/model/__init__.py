"""The network, which reads like the paper and calls only operators.

config, weights     what a model is, and what it owns; config_file and json_section read config.json
text, vision, mtp   the decoder, the vision tower, the layer that guesses the token after the next; rope: their angles
state, state_file   what one sequence remembers, in memory and in a file
replay              the same steps without Python (CPU) or the host (GPU) in the way
choice              how a token is chosen within such a step
"""
