"""From files to the weights of a model.

hub, checkpoint     where the files are, and which tensors are in them
names, precision    which tensors there have to be, and the number format of each
source, build       what a model asks for, whoever answers:
packer, packed      a checkpoint that is packed in memory, or a packed folder that is mapped
streaming           packing into a file what is larger than memory
fingerprint         a name for what was loaded
"""
