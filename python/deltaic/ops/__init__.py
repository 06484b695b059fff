"""The arithmetic: sets of operators with the same names and arguments, and what they share.

reference           every operator in readable numpy: the definition
cpu                 the same in C++ (csrc/cpu)
cuda, cuda_*        the same on an NVIDIA GPU (csrc/cuda)
devices             which of them computes, its lock and threads
layout, quantise, bpe  how patches, K/V rows, packed weights and merges lie in memory
memory              where a state's arrays lie
"""
