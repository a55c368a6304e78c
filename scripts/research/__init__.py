"""How good the saliency maps and the answers are: evaluations, class images, localisation. Nothing that serves imports these."""
