"""Text in, packed token sequences out: `sources` finds and reads documents, `pack` tokenises and cuts them."""
