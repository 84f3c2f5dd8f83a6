"""From files to packed batches. Read in this order:

schema     what a row is, and the errors that say what is wrong with one
media      images and videos, opened within limits
tiling     an image as a grid of square tiles
template   text ↔ tokens, the chat layout, where tiles stand in the sequence
processor  a conversation as one encoded sample; samples as a packed Batch
packing    which samples share a row
mixture    how often every source is read, and in which order
loader     an endless, resumable stream of packed rows
"""
