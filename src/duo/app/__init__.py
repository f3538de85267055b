"""`duo app`: the page on which pairs are curated, the original and the erased model compared, and reports read.

What the page does is in `places`, `curation`, `comparison` and `reporting`, which know nothing of gradio; `page` lays
it out, and `serving` decides who may reach it.
"""
