// Formulas of pages (arithmatex) and of notebooks; again after each instant navigation.
window.MathJax = {
  tex: { inlineMath: [["\\(", "\\)"], ["$", "$"]], displayMath: [["\\[", "\\]"], ["$$", "$$"]] },
  options: { ignoreHtmlClass: ".*|", processHtmlClass: "arithmatex|jp-MarkdownOutput|jp-RenderedHTMLCommon" },
};
