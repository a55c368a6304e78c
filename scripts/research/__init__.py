"""Evaluations of the saliency maps and of the answers, class images, localisation. Nothing that serves imports these."""
