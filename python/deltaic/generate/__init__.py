"""From a prompt to text.

runner              feeds sequences to the model: chunks of prompts, tokens, drafts
prefix, cache, spill, reading, prefill  a prompt gets into a state, from where something like it was read before
options, sampling   what may be asked for; a token is chosen
speculate, lookup, costs  which tokens may come next, and how many of them are worth verifying
answer, stop, result  tokens become pieces of text and a result
loop, stream        one sequence: its tokens, and what its caller holds
sequence, batch, chunked_prefill, scheduler, request  many: the record of each, what a step computes, how prompts are
                    read beside it, who runs, what callers hold
"""
