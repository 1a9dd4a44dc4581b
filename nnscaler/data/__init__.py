"""From text to packed token sequences: `sources` finds and reads documents, `pack` tokenises and cuts them."""
