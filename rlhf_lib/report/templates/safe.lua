-- Nothing raw, nothing foreign: the report's first filter, for pandoc's HTML and typst writers.
--
-- HTML is read again into plain blocks without attributes, links lead to the web or into the report,
-- images are those that the notebook carries. What comes after this filter may trust the tree; the
-- only raw pieces in it are the fixed strings that structure.lua and tables.lua write themselves.

-- What an image or a link may be -----------------------------------------------------------------

local embedded = {} -- names of the images that the notebook itself carries

local function keep_image(image)
  if not embedded[image.src] then
    -- a picture from elsewhere is not fetched; its description says what it was
    return image.caption
  end
  return pandoc.Image(image.caption, image.src)
end

local function is_web_address(url)
  -- no quotes, backslashes, spaces or control characters, whatever the scheme
  return url:match("^https?://[%w%-%._~:/%?#%[%]@!%$&%(%)%*%+,;=%%]+$") ~= nil
    or url:match("^mailto:[%w%-%._@%+]+$") ~= nil
end

local function web_link(link)
  if is_web_address(link.target) then
    return pandoc.Link(link.content, link.target)
  end
  return link.content
end

-- A link of the notebook's own author may also point into the report; structure.lua looks where to.
local function prose_link(link)
  if link.target:match("^#[^#]+$") or link.target:match("^[%w_%-%./]+%.ipynb#?[^#]*$") then
    return pandoc.Link(link.content, link.target)
  end
  return web_link(link)
end

-- HTML outputs: read again, stripped of everything but structure ---------------------------------

local READ_HTML = "html-raw_html-auto_identifiers-smart"

-- Of attributes there are left these classes, of what `review/reader.py` writes.
local KEPT = pandoc.List({
  "reading", "printed", "right", "wrong", "polite", "refusal", "empty", "bar", "proxy", "gold", "judge",
})

local function kept(make)
  return function(element)
    local classes = element.classes:filter(function(class) return KEPT:includes(class) end)
    return #classes > 0 and make(element.content, pandoc.Attr("", classes)) or element.content
  end
end

local from_html = {
  RawBlock = function() return {} end,
  RawInline = function() return {} end,
  Math = function(math) return pandoc.Inlines(math.text) end,
  Image = keep_image,
  Link = web_link,
  Div = kept(pandoc.Div),
  Span = kept(pandoc.Span),
  Header = function(header) return pandoc.Para({ pandoc.Strong(header.content) }) end,
  Code = function(code) return pandoc.Code(code.text) end,
  CodeBlock = function(block) return pandoc.CodeBlock(block.text) end,
}

-- pandoc's HTML reader fetches what an iframe names, even a file of this machine: so it sees none,
-- and the last argument, no files, puts it into a sandbox of its own.
local function read_html(text)
  text = text:gsub("<(/?)[iI][fF][rR][aA][mM][eE]", "<%1span")
  -- what unfolds is no element to it; structure.lua folds it again
  text = text:gsub("<(/?)details", "<%1div"):gsub("<(/?)summary", "<%1p")
  return pandoc.read(text, READ_HTML, nil, {}):walk(from_html).blocks
end

-- Prose: TeX environments, stray HTML, links between notebooks -----------------------------------

-- pandoc converts `aligned` and `gathered`, written inside a formula, and not their outer kin
local function inner_environments(tex)
  for outer, inner in pairs({ align = "aligned", gather = "gathered" }) do
    tex = tex:gsub("\\begin{" .. outer .. "%*?}", "\\begin{" .. inner .. "}")
    tex = tex:gsub("\\end{" .. outer .. "%*?}", "\\end{" .. inner .. "}")
  end
  return (tex:gsub("\\begin{equation%*?}", ""):gsub("\\end{equation%*?}", ""))
end

local function read_tex(text)
  if text:match("^%s*\\begin{%a+%*?}") then
    return pandoc.Math("DisplayMath", inner_environments(text))
  end
  return pandoc.Code(text) -- a lone command outside of any formula is shown as it is written
end

-- Real tags are dropped around their text. Anything else in angle brackets, such as <eos>, is text.
local TAGS = pandoc.List({
  "a", "abbr", "audio", "b", "big", "button", "center", "code", "del", "details", "div", "em",
  "embed", "font", "form", "hr", "i", "iframe", "input", "ins", "kbd", "mark", "math", "mi", "mn",
  "mo", "object", "p", "q", "s", "script", "small", "span", "strong", "style", "sub", "summary",
  "sup", "svg", "table", "tbody", "td", "th", "thead", "tr", "u", "video", "wbr",
})

local function inline_html(text)
  local tag = text:match("^</?%s*(%a[%w%-]*)")
  if tag and tag:lower() == "br" then
    return pandoc.LineBreak()
  end
  if tag and tag:lower() == "img" then
    return pandoc.utils.blocks_to_inlines(read_html(text))
  end
  if text:match("^<!") or (tag and TAGS:includes(tag:lower())) then
    return {}
  end
  return pandoc.Inlines(text)
end

local from_prose = {
  RawBlock = function(block)
    if block.format == "html" then
      return read_html(block.text)
    end
    return pandoc.Para({ read_tex(block.text) })
  end,
  RawInline = function(inline)
    if inline.format == "html" then
      return inline_html(inline.text)
    end
    return read_tex(inline.text)
  end,
  Math = function(math)
    return pandoc.Math(math.mathtype, inner_environments(math.text))
  end,
  Image = keep_image,
  Link = prose_link,
  Div = function(div) return div.content end,
  Span = function(span) return span.content end,
}

-- The cells --------------------------------------------------------------------------------------

-- What a program printed or displayed. It may hold anything, a model's text above all.
local from_output = {
  RawBlock = function(block)
    return block.format == "html" and read_html(block.text) or {}
  end,
  Image = keep_image,
}

function Pandoc(doc)
  for _, item in ipairs(pandoc.mediabag.list()) do
    embedded[item.path] = true
  end
  for _, cell in ipairs(doc.blocks) do
    -- only the cell's content: the cell itself is a Div, and its attributes say what it is
    local rules = cell.classes:includes("markdown") and from_prose or from_output
    cell.content = cell.content:walk(rules)
  end
  return doc
end
