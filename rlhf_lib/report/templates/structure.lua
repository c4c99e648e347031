-- Chapters, headings, captions, folded code: the second filter of the report, for HTML and typst.
--
-- `SplitCells` in report_clean.py gives every cell one role (prose, code, output) in its metadata.

local HTML = FORMAT:match("html") ~= nil

-- Small helpers ----------------------------------------------------------------------------------

local function raw(text)
  return pandoc.RawBlock(HTML and "html" or "typst", text)
end

local function plain_text(element)
  return pandoc.utils.stringify(element)
end

-- Letters, digits and hyphens only: valid as an HTML id and as a typst label.
local function slug(text)
  local id = text:lower():gsub("[^%w_%-]+", "-"):gsub("^%-+", ""):gsub("%-+$", "")
  return id ~= "" and id or "section"
end

local function append(list, more)
  for _, item in ipairs(more) do
    list:insert(item)
  end
end

-- Outputs and code -------------------------------------------------------------------------------

-- "Figure 3. What it shows" -> "figure", "3", "Figure 3.", "What it shows"
local function read_caption(caption)
  local word, number, text = caption:match("^(%a+) (%d+)%. ?(.*)$")
  return word:lower(), number, word .. " " .. number .. ".", text
end

local shown_as = {} -- figures and tables that have a name, by chapter: a link to it shows their number
local within = "" -- the chapter that is read

local function captioned(cell, content)
  local kind, number, label, text = read_caption(cell.attributes.caption)
  local id = kind .. "-" .. number
  if cell.attributes.name then
    shown_as[within .. "#" .. cell.attributes.name] = { text = label:sub(1, -2), id = id }
  end
  local alt = cell.attributes.alt and cell.attributes.alt:sub(6) -- after "alt: "
  local words, aloud = pandoc.Inlines(text), alt or text -- read in the picture's stead
  content = content:walk({
    Image = function(image) return pandoc.Image(pandoc.Inlines(aloud), image.src) end,
  })
  local blocks = pandoc.Blocks({})
  local line = pandoc.Plain({ pandoc.Strong({ pandoc.Str(label) }), pandoc.Space() })
  line.content:extend(words)
  if HTML then
    blocks:insert(raw(('<figure class="%s" id="%s">'):format(kind, id)))
    local caption_blocks = { raw("<figcaption>"), line, raw("</figcaption>") }
    append(blocks, kind == "table" and caption_blocks or content)
    append(blocks, kind == "table" and content or caption_blocks)
    blocks:insert(raw("</figure>"))
  else
    local call = '#metadata(none) <%s>\n#report-captioned("%s", "%s", ['
    blocks:insert(raw(call:format(id, kind, aloud:gsub('[\\"]', "\\%0"))))
    blocks:insert(line)
    blocks:insert(raw("])["))
    append(blocks, content)
    blocks:insert(raw("]"))
  end
  return blocks
end

-- Of `review/reader.py`, as safe.lua left it: requests that unfold; on paper those that it picked.
local INKS = {
  right = "1a6e30", wrong = "b3261e", polite = "7a3fc4", refusal = "0a58b0", empty = "6e5a08",
  proxy = "5f6772", judge = "5f6772", gold = "8a6a00",
}

local READING = {
  Span = function(span)
    local ink = not HTML and INKS[span.classes[#span.classes]]
    if not ink then
      return nil
    end
    local set = pandoc.RawInline("typst", ('#text(fill: rgb("#%s"))['):format(ink))
    return pandoc.Inlines({ set }) .. span.content .. pandoc.Inlines({ pandoc.RawInline("typst", "]") })
  end,
  Div = function(div)
    local asked, replies = div.content[1], div.content
    if not (div.classes:includes("reading") and asked and asked.t == "Para") then
      return nil
    end
    replies:remove(1)
    if HTML then
      local blocks = pandoc.Blocks({ raw('<details class="reading"><summary>') })
      append(blocks, { pandoc.Plain(asked.content), raw("</summary>") })
      append(blocks, replies)
      blocks:insert(raw("</details>"))
      return blocks
    elseif not div.classes:includes("printed") then
      return {}
    end
    replies:insert(1, pandoc.Para({ pandoc.Strong(asked.content) }))
    return replies
  end,
}

local KINDS = { stdout = true, stderr = true, error = true, figure = true, table = true }

local function show_output(cell)
  local content = pandoc.Blocks({})
  for _, block in ipairs(cell.content) do
    if block.t == "Div" then
      append(content, block.content)
    end
  end
  content = content:walk(READING)
  if cell.attributes.caption then
    content = captioned(cell, content)
  end
  local kind = KINDS[cell.attributes.kind] and cell.attributes.kind or "result"
  if HTML then
    return { pandoc.Div(content, pandoc.Attr("", { "output", kind })) }
  end
  content:walk({ Image = function() kind = "figure" end })
  content:insert(1, raw(('#report-output("%s")['):format(kind)))
  content:insert(raw("]"))
  return content
end

-- What a fold holds: the first line of code that is no import, comment or decorator.
local function gist(code)
  local inside = false -- an import over several lines
  for line in (code .. "\n"):gmatch("(.-)\n") do
    local import = line:match("^import ") or line:match("^from ")
    if inside then
      inside = not line:match("^%)")
    elseif import then
      inside = line:match("%($") ~= nil
    elseif line:match("^[%a_]") then
      return utf8.len(line) and utf8.len(line) > 64 and line:sub(1, utf8.offset(line, 64) - 1) .. "…" or line
    end
  end
  return "imports"
end

local function escaped(text)
  return (text:gsub("&", "&amp;"):gsub("<", "&lt;"):gsub(">", "&gt;"))
end

local function show_code(cell)
  if not HTML then
    return {}
  end
  local code = cell.content:filter(function(block) return block.t == "CodeBlock" end)
  local first = code[1] and gist(code[1].text) or ""
  local summary = "<summary>Code: <code>" .. escaped(first) .. "</code></summary>"
  local blocks = pandoc.Blocks({ raw('<details class="code">' .. summary) })
  append(blocks, code)
  blocks:insert(raw("</details>"))
  return blocks
end

-- "(arXiv:1707.06347," with the number as a link, and "[-0.4," with a minus, as typst has it.
local function linked(str)
  local before, id, after = str.text:match("^(.-)arXiv:(%d%d%d%d%.%d%d%d%d%d)(.*)$")
  if id then
    local link = pandoc.Link("arXiv:" .. id, "https://arxiv.org/abs/" .. id)
    return { pandoc.Str(before), link, pandoc.Str(after) }
  end
  return HTML and pandoc.Str((str.text:gsub("^([%[%(]*)%-(%d)", "%1−%2"))) or nil
end

local function show_prose(cell)
  local content = cell.content:walk({ Str = linked })
  for i, block in ipairs(content) do
    if block.t == "Plain" then
      content[i] = pandoc.Para(block.content) -- what stood in a <summary>, for one
    end
  end
  if cell.attributes.caption then
    return captioned(cell, content)
  end
  return content
end

-- Written as <details><summary>Solution</summary> ... </details>, of which safe.lua left the text.
local function show_solution(cell)
  if not HTML then
    return {} -- paper does not fold, and a solution under its task is no exercise
  end
  local content = show_prose(cell)
  if content[1] and plain_text(content[1]) == "Solution" then
    content:remove(1)
  end
  local blocks = pandoc.Blocks({ raw('<details class="solution"><summary>Solution</summary>') })
  append(blocks, content)
  blocks:insert(raw("</details>"))
  return blocks
end

-- Headings, and the links that lead to them ------------------------------------------------------

local function heading_plan(report)
  local plan = { taken = {}, anchors = {}, chapters = {}, prefix = "", merged = report ~= nil }
  function plan.unique(id)
    local free, count = id, 1
    while plan.taken[free] do
      count = count + 1
      free = id .. "-" .. count
    end
    plan.taken[free] = true
    return free
  end
  return plan
end

-- Give each heading of a chapter its level and id. The first of level 1 names the chapter.
local function place_headings(blocks, plan, chapter)
  local named = false
  return blocks:walk({
    Header = function(header)
      local text = plain_text(header)
      local level = header.level
      if level == 1 and not named then
        named = true
        if chapter.is_title then
          plan.title = plan.title or header.content
          if plain_text(plan.title) == text then
            return {} -- it stands on the title page already
          end
          level = 2
        end
      elseif level == 1 then
        level = 2
      end
      if shown_as[chapter.id .. "#" .. slug(text)] then
        error(("%q is a section and the name of a figure or table"):format(slug(text)))
      end
      local id = level == 1 and chapter.id or chapter.id .. "-" .. slug(text)
      id = plan.unique(slug(id))
      plan.anchors[chapter.id .. "#" .. slug(text)] = id
      if level == 1 then
        plan.chapters[chapter.id] = id
        chapter.title, chapter.anchor = header.content, id
      end
      local unlisted = chapter.unlisted and { "unnumbered", "unlisted" } or {}
      return pandoc.Header(level, header.content, pandoc.Attr(id, unlisted))
    end,
  }), named
end

-- "#section", "05_grpo.ipynb", "05_grpo.ipynb#section" lead into the report if the place is there.
local function resolve_links(blocks, plan, chapter)
  return blocks:walk({
    Link = function(link)
      if link.target:match("^%a+:") then
        return nil -- into the web
      end
      local notebook, section = link.target:match("([%w_%-%.]+)%.ipynb#?([^#]*)$")
      section = section or link.target:match("^#(.+)$")
      local id = notebook and "nb-" .. notebook or chapter.id
      local shown = section and shown_as[id .. "#" .. section]
      if shown then
        return pandoc.Link(shown.text, "#" .. shown.id)
      end
      local target = section and plan.anchors[id .. "#" .. slug(section)] or plan.chapters[id]
      if target then
        return pandoc.Link(link.content, "#" .. target)
      elseif notebook and HTML and not plan.merged then
        return pandoc.Link(link.content, notebook .. ".html") -- exported one by one, side by side
      end
      return link.content
    end,
  })
end

-- The whole document -----------------------------------------------------------------------------

-- typst reads "1." or "=" at the beginning of a cell or caption as a list or a heading, and "..." or
-- "-?" as another character. pandoc lets them through, so such a word is written as a string.
local function as_string(str)
  local text = str.text
  local rest = text:match("^=+(.*)$")
    or text:match("^[%-%+/](.*)$")
    or text:match("^%d+%.(.*)$")
  local marker = rest and (rest == "" or rest:byte() > 127) -- what is not ASCII might be a space
  if marker or text:find("...", 1, true) or text:find("-?", 1, true) then
    return pandoc.RawInline("typst", '#"' .. text:gsub('[\\"]', "\\%0") .. '";')
  end
end

-- Ways to the chapters before and after, at a chapter's end.
local function around(chapters, place)
  local links = pandoc.Blocks({})
  for _, way in ipairs({ { -1, "← " }, { 1, "→ " } }) do
    local other = chapters[place + way[1]]
    if other and other.title then
      local words = pandoc.Inlines({ pandoc.Str(way[2]) })
      words:extend(other.title)
      links:insert(pandoc.Para({ pandoc.Link(words, "#" .. other.anchor) }))
    end
  end
  return pandoc.Div(links, pandoc.Attr("", { "around" }))
end

local SHOW = { prose = show_prose, solution = show_solution, code = show_code, output = show_output }

local function split_chapters(doc)
  local chapters = pandoc.List({})
  for _, cell in ipairs(doc.blocks) do
    local chapter = cell.attributes.chapter
    if chapter or #chapters == 0 then
      chapters:insert({ id = slug(chapter or ""), name = chapter, blocks = pandoc.Blocks({}) })
      within = chapters[#chapters].id
    end
    local blocks = chapters[#chapters].blocks
    if not HTML then
      -- an error of typst's names a line; this names the cell it is in
      local where = (cell.attributes.place or ""):gsub("[^%w%._%-, ]", "?")
      blocks:insert(raw("// cell: " .. where))
    end
    -- an output in markdown is a markdown cell: it is typeset as prose is
    local prose = cell.classes:includes("markdown") and cell.attributes.role ~= "solution"
    local role = prose and "prose" or cell.attributes.role
    append(blocks, SHOW[role](cell))
  end
  return chapters
end

local function inlines(text)
  return text and text ~= "" and pandoc.Inlines(text) or nil
end

function Pandoc(doc)
  local report = doc.meta.jupyter and doc.meta.jupyter.report
  local plan = heading_plan(report)
  plan.title = report and inlines(report.title)

  local chapters = split_chapters(doc)
  for i, chapter in ipairs(chapters) do
    local alone = #chapters == 1
    chapter.is_title = alone or (i == 1 and report and report.front)
    chapter.unlisted = chapter.is_title and not alone
    local named
    chapter.blocks, named = place_headings(chapter.blocks, plan, chapter)
    if not named and not chapter.is_title then
      -- the contents need a name for the chapter: the file's, if the notebook gives none
      local id = plan.unique(chapter.id)
      plan.chapters[chapter.id] = id
      local name = chapter.name:gsub("^nb%-", "")
      chapter.blocks:insert(1, pandoc.Header(1, pandoc.Inlines(name), pandoc.Attr(id)))
    end
  end

  local body = pandoc.Blocks({})
  for i, chapter in ipairs(chapters) do
    local front = i == 1 and chapter.unlisted and not HTML
    if front then body:insert(raw("#report-front[")) end
    append(body, resolve_links(chapter.blocks, plan, chapter))
    if HTML and chapter.title and #chapters > 1 then
      body:insert(around(chapters, i))
    end
    if front then
      body:insert(raw("]"))
      body:insert(raw("#report-contents()"))
    end
  end
  local meta = { title = plan.title or pandoc.Inlines("Notebook") }
  meta.subtitle = report and inlines(report.subtitle)
  meta.banner = report and inlines(report.banner)
  meta.front = chapters[1] ~= nil and chapters[1].unlisted or false
  local whole = pandoc.Pandoc(body, meta)
  return HTML and whole or whole:walk({ Str = as_string })
end
