// Pages have \(…\) and \[…\] (arithmatex), notebooks $…$ and $$…$$; code is left alone.
window.MathJax = {
  tex: { inlineMath: [["\\(", "\\)"], ["$", "$"]], displayMath: [["\\[", "\\]"], ["$$", "$$"]] },
};
