// Run in a page: an object with everything that is wrong with how it is laid out.
(() => {
  const wrong = [];
  const shown = (element) => element.getClientRects().length > 0;
  const rgba = (text) => {
    const numbers = (text.match(/[\d.]+/g) || []).map(Number);
    return { r: numbers[0], g: numbers[1], b: numbers[2], a: numbers.length > 3 ? numbers[3] : 1 };
  };
  // By the definitions of the WCAG.
  const luminance = ({ r, g, b }) => {
    const [x, y, z] = [r, g, b].map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const contrast = (one, other) => {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const backdrop = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgba(getComputedStyle(at).backgroundColor);
      if (colour.a === 1) return colour;
    }
    return { r: 255, g: 255, b: 255, a: 1 };
  };
  const name = (element) => `${element.tagName} "${element.textContent.trim().slice(0, 40)}"`;
  const legible = (element, colour, behind) => {
    const found = contrast(colour, behind);
    if (!(found >= 4.5)) wrong.push(`contrast ${found.toFixed(2)} of ${name(element)}`);
  };

  const root = document.documentElement;
  if (root.scrollWidth > innerWidth) wrong.push(`${root.scrollWidth} pixels wide, the screen has ${innerWidth}`);
  for (const element of document.querySelectorAll("body *")) {
    if (element.closest(".scroll") && !element.matches(".scroll")) continue;
    const box = element.getBoundingClientRect();
    if (box.width > 0 && (box.right > innerWidth + 0.5 || box.left < -0.5)) wrong.push(`off the screen: ${name(element)}`);
  }
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const behind = luminance(backdrop(document.body));
  if (dark ? behind > 0.05 : behind < 0.8) wrong.push(`the background of the ${dark ? "dark" : "light"} page has luminance ${behind}`);

  let texts = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || element.closest("svg") || !shown(element)) continue;
    texts += 1;
    const style = getComputedStyle(element);
    legible(element, rgba(style.color), backdrop(element));
    if (parseFloat(style.fontSize) < 12) wrong.push(`${style.fontSize}: ${name(element)}`);
  }

  let plots = 0;
  for (const svg of document.querySelectorAll("svg")) {
    if (!shown(svg)) continue;
    plots += 1;
    const box = svg.getBoundingClientRect();
    const title = svg.querySelector("title").textContent;
    if (box.width < 200 || box.height < 40) wrong.push(`${title}: ${box.width} x ${box.height} pixels`);
    const all = [...svg.querySelectorAll("text")].map((element) => ({ element, box: element.getBoundingClientRect() }));
    if (all.length === 0) wrong.push(`${title}: no text`);
    const scale = box.width / svg.viewBox.baseVal.width;
    for (const [index, one] of all.entries()) {
      texts += 1;
      const style = getComputedStyle(one.element);
      const size = parseFloat(style.fontSize) * scale;
      if (size < 11) wrong.push(`${title}: ${size.toFixed(1)} pixels: ${name(one.element)}`);
      if (one.box.left < box.left - 0.5 || one.box.right > box.right + 0.5 || one.box.top < box.top - 0.5 || one.box.bottom > box.bottom + 0.5) {
        wrong.push(`${title}: out of the drawing: ${name(one.element)}`);
      }
      // The last area that is painted below its middle.
      const [x, y] = [(one.box.left + one.box.right) / 2, (one.box.top + one.box.bottom) / 2];
      const areas = [...svg.querySelectorAll("rect")].filter((rect) => {
        const area = rect.getBoundingClientRect();
        const before = rect.compareDocumentPosition(one.element) & Node.DOCUMENT_POSITION_FOLLOWING;
        return before && area.left <= x && x <= area.right && area.top <= y && y <= area.bottom;
      });
      const area = areas.pop();
      legible(one.element, rgba(style.fill), area ? rgba(getComputedStyle(area).fill) : backdrop(svg));
      for (const other of all.slice(index + 1)) {
        // Half a pixel: boxes of text have room above and below the letters.
        const apart = one.box.right <= other.box.left + 0.5 || other.box.right <= one.box.left + 0.5
          || one.box.bottom <= other.box.top + 0.5 || other.box.bottom <= one.box.top + 0.5;
        if (!apart) wrong.push(`${title}: ${name(one.element)} over ${name(other.element)}`);
      }
    }
  }
  return { wrong, plots, texts, width: innerWidth };
})()
