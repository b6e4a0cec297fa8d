// Elements, and bringing a tree up to date in place: focus, selection and what a person opened or closed stay.
// Text from outside becomes text nodes and attributes only, never markup.

// `open` of <details> is the reader's; `style` is set below.
const KEPT = ["open", "style"];

export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "vars") {
      for (const [variable, text] of Object.entries(value)) element.style.setProperty(variable, text);
    } else {
      element.setAttribute(name, value === true ? "" : String(value));
    }
  }
  element.append(
    ...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false),
  );
  return element;
}

export const byId = (id) => document.getElementById(id);

// Make the children of `parent` what `children` are.
export function show(parent, ...children) {
  const wanted = document.createElement(parent.tagName);
  wanted.append(...children.flat(Infinity).filter(Boolean));
  morphChildren(parent, wanted);
}

function morphChildren(parent, wanted) {
  const keyed = new Map(
    [...parent.children].filter((each) => each.dataset.key).map((each) => [each.dataset.key, each]),
  );
  let place = parent.firstChild;
  for (const want of [...wanted.childNodes]) {
    const have = want.dataset?.key ? keyed.get(want.dataset.key) : place;
    if (!have || !isSameKind(have, want)) {
      parent.insertBefore(want, place);
      continue;
    }
    if (have === place) place = place.nextSibling;
    else parent.insertBefore(have, place);
    morph(have, want);
  }
  while (place) {
    const next = place.nextSibling;
    place.remove();
    place = next;
  }
}

function isSameKind(have, want) {
  return have.nodeName === want.nodeName && (have.dataset?.key ?? "") === (want.dataset?.key ?? "");
}

function morph(have, want) {
  if (have.nodeType !== Node.ELEMENT_NODE) {
    if (have.data !== want.data) have.data = want.data;
    return;
  }
  for (const { name } of [...have.attributes]) {
    if (!want.hasAttribute(name) && !KEPT.includes(name)) have.removeAttribute(name);
  }
  for (const { name, value } of want.attributes) {
    if (!KEPT.includes(name) && have.getAttribute(name) !== value) have.setAttribute(name, value);
  }
  // Not as an attribute: the Content-Security-Policy forbids style attributes.
  if (have.style.cssText !== want.style.cssText) have.style.cssText = want.style.cssText;
  morphChildren(have, want);
}
