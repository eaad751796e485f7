"""One file for the layouts of each library's SAEs; [`hf_ext.sae.convert`] is the door."""
