"""The paper's tables again: what stands in them, what each cell is made of, and what was measured.

`tables` says which models, tasks and ways to quantize a table has, `published` which figures stand
there; `inputs` reads rows, `arms` tunes, `cells` measures one figure after the other, `panels` puts
them beside those that were published.
"""
