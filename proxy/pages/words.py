"""The words on the pages, in each language. Pure.

A template asks for a word by its name; a test sees to it that every language has every name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

ENGLISH = "en"
JAPANESE = "ja"
LANGUAGES = {ENGLISH: "English", JAPANESE: "日本語"}

# name: (English, Japanese)
_WORDS = {
    "conversations": ("Conversations", "会話"),
    "live": ("Live", "稼働状況"),
    "import": ("Import", "取り込み"),
    "forget_all": ("Forget everything", "すべて削除"),
    "log_out": ("Log out", "ログアウト"),
    "log_in": ("Log in", "ログイン"),
    "owner": ("Owner", "所有者"),
    "owners": ("Whose conversations?", "誰の会話を見ますか"),
    "owners_hint": (
        "Each API key and each user is an owner of their own. Here are all of them, who spoke last "
        "first.",
        "API キーと利用者ごとに所有者が分かれています。最近話した順に並んでいます。",
    ),
    "change_owner": ("Another owner", "所有者を変える"),
    "choose": ("Show", "表示"),
    "skip": ("Skip to the content", "本文へ移動"),
    "search": ("Search", "検索"),
    "search_hint": ("Words in turns and summaries", "発言と要約の中の言葉"),
    "nothing_found": ("Nothing was found.", "見つかりませんでした。"),
    "no_conversations": (
        "There are no conversations yet. They appear here as soon as the first answer is stored.",
        "会話はまだありません。最初の応答が保存されるとここに表示されます。",
    ),
    "no_conversations_user": (
        "LibreChat sends a user's id with each request: its chats lie under that user. Log in with "
        "the user's id, or with an owner's name as `chatfold inspect owners` prints it.",
        "LibreChat は利用者の ID を送るので、会話はその利用者の下に保存されます。利用者の ID か、"
        "`chatfold inspect owners` が表示する所有者名でログインしてください。",
    ),
    "in_messages": ("In turns", "発言"),
    "in_summaries": ("In summaries", "要約"),
    "n_messages": ("{n} messages", "メッセージ {n} 件"),
    "n_turns": ("{n} turns", "{n} ターン"),
    "n_summaries": ("{n} summaries", "要約 {n} 件"),
    "n_tokens": ("{n} tokens", "{n} トークン"),
    "n_conversations": ("{n} conversations", "会話 {n} 件"),
    "n_messages_1": ("1 message", "メッセージ 1 件"),
    "n_turns_1": ("1 turn", "1 ターン"),
    "n_summaries_1": ("1 summary", "要約 1 件"),
    "n_tokens_1": ("1 token", "1 トークン"),
    "n_conversations_1": ("1 conversation", "会話 1 件"),
    "n_ends": ("branches: {n}", "枝 {n} 本"),
    "not_counted": ("not counted yet", "未計測"),
    "last_said": ("last said {when}", "最終発言 {when}"),
    "newer": ("Newer", "新しい方へ"),
    "older": ("Older", "古い方へ"),
    "overview": ("Overview", "概要"),
    "turns": ("Turns", "ターン"),
    "summaries": ("Summaries", "要約"),
    "branches": ("Branches", "枝"),
    "context": ("What the model sees", "モデルに見える内容"),
    "export": ("Export", "書き出し"),
    "forget": ("Forget", "削除"),
    "timeline": ("Timeline", "時系列"),
    "goes_in": (
        "What goes to the model: {summaries} of {turns}, then turns {first} to {last} word for word.",
        "モデルに渡る内容: {turns}分の{summaries}、続いてターン {first}〜{last} の原文。",
    ),
    "most": ("most: {value}", "最大: {value}"),
    "seconds": ("{n} s", "{n} 秒"),
    "all_turns": ("All turns", "すべてのターン"),
    "timeline_hint": (
        "Each bar is a turn, as high as it has tokens. A box above stands for the turns below it.",
        "棒が 1 ターン、高さがトークン数です。上の箱は下にあるターンを要約したものです。",
    ),
    "legend_verbatim": ("word for word", "原文のまま"),
    "legend_folded": ("told by a summary", "要約で伝達"),
    "legend_active": ("in use", "使用中"),
    "legend_waiting": ("written, not warm yet", "作成済み・準備中"),
    "legend_past": ("merged or replaced", "統合・置換済み"),
    "legend_memory": ("warm, in memory", "メモリー上で準備済み"),
    "legend_disk": ("on disk", "ディスク上"),
    "warm_memory": (
        "Warm: {n} of {of} tokens of what stands before your next message are in memory.",
        "準備済み: 次の発言の前に置かれる {of} トークン中 {n} がメモリーにあります。",
    ),
    "warm_disk": (
        "{n} of {of} tokens of what stands before your next message are in memory, {disk} on disk: "
        "they come back by a copy.",
        "次の発言の前に置かれる {of} トークン中 {n} がメモリー、{disk} がディスクにあり、読み戻せます。",
    ),
    "warm_cold": (
        "Cold: none of the {of} tokens of what stands before your next message are in the cache.",
        "未準備: 次の発言の前に置かれる {of} トークンはキャッシュにありません。",
    ),
    "warm_slot": (
        "Warm: this conversation sits in a slot of the server, by chatfold's own books.",
        "準備済み: この会話はサーバーのスロットにあります（chatfold の記録による）。",
    ),
    "warm_file": (
        "This conversation was left in a file of the server, by chatfold's own books: it comes back "
        "by a copy.",
        "この会話はサーバーのファイルに保存され、読み戻せます（chatfold の記録による）。",
    ),
    "warm_sequence": (
        "Warm: the server's one sequence holds this conversation, by chatfold's own books.",
        "準備済み: サーバーの唯一のシーケンスにこの会話があります（chatfold の記録による）。",
    ),
    "warm_elsewhere": (
        "Cold, by chatfold's own books: nothing of this conversation was left on the server.",
        "未準備: この会話はサーバー上に残っていません（chatfold の記録による）。",
    ),
    "warm_unknown": (
        "What of this is warm is not known: the model is busy or away, or runs on a server that "
        "does not tell.",
        "準備済みの範囲は不明です。モデルが処理中か停止中、または外部サーバーが情報を出しません。",
    ),
    "state_active": ("in use", "使用中"),
    "state_waiting": ("written, not warm yet", "作成済み・準備中"),
    "state_past": ("merged or replaced", "統合・置換済み"),
    "rank": ("rank {n}", "階層 {n}"),
    "turn": ("Turn {n}", "ターン {n}"),
    "turns_span": ("Turns {first} to {last}", "ターン {first}〜{last}"),
    "in_use_now": ("Summaries in use", "使用中の要約"),
    "no_summaries": (
        "No summaries yet: all turns go to the model word for word.",
        "要約はまだありません。すべてのターンが原文のままモデルに渡されます。",
    ),
    "newest_turns": ("Newest turns", "最新のターン"),
    "made_model": ("written by the model", "モデルが作成"),
    "made_extractive": ("sentences of the chat", "会話の文を抜粋"),
    "made_edited": ("corrected by hand", "手で修正"),
    "checks_passed": ("all checks passed", "検査はすべて合格"),
    "checks_failed": ("the model's own text failed: {names}", "モデルの文が不合格: {names}"),
    "check_empty": ("nothing came", "空"),
    "check_too_long": ("too long", "長すぎる"),
    "check_refusal": ("it refused", "拒否"),
    "check_tool_call": ("it called a tool", "ツール呼び出し"),
    "check_markup": ("markup", "マークアップ"),
    "check_repetition": ("it repeats itself", "繰り返し"),
    "check_echo": ("it only says again what was said", "発言のなぞり"),
    "check_wrong_language": ("another language", "別の言語"),
    "check_invented_number": ("a number nobody said", "元にない数"),
    "check_invented_name": ("a name nobody said", "元にない名前"),
    "check_off_topic": ("off the subject", "話題外"),
    "took": ("took {s} s", "所要 {s} 秒"),
    "model": ("model", "モデル"),
    "policy": ("policy", "方針"),
    "prompt_version": ("prompt", "プロンプト"),
    "written_at": ("written", "作成"),
    "in_use_since": ("in use since", "使用開始"),
    "details": ("How it was made", "作成の経緯"),
    "turns_behind": ("The turns behind it", "元のターン"),
    "made_from": ("Made of these summaries", "統合元の要約"),
    "went_into": ("Went into", "統合先"),
    "summary": ("Summary {n}", "要約 {n}"),
    "user": ("user", "ユーザー"),
    "assistant": ("assistant", "アシスタント"),
    "tool": ("tool", "ツール"),
    "system": ("system", "システム"),
    "note": ("told with this message", "この発言と共に伝えた内容"),
    "context_hint": (
        "Word for word what stands before your next message, summaries and all. The chat template's "
        "own marks are added to it.",
        "次の発言の前に置かれる内容そのものです。要約も含みます。これにチャットテンプレートの記号が加わります。",
    ),
    "context_no_model": (
        "The model is not loaded yet, and only its tokenizer can tell what fits.",
        "モデルがまだ読み込まれていません。何が収まるかはその分割器にしか分かりません。",
    ),
    "shape": (
        "{verbatim} turns word for word ({verbatim_tokens} tokens), {summaries} summaries "
        "({summary_tokens} tokens), system prompt {system_tokens} tokens, left out: {dropped} "
        "messages; the window holds {window}.",
        "原文 {verbatim} ターン（{verbatim_tokens} トークン）、要約 {summaries} 件"
        "（{summary_tokens} トークン）、システムプロンプト {system_tokens} トークン、"
        "省略 {dropped} 件、窓の大きさ {window}。",
    ),
    "branches_hint": (
        "Edits and regenerated answers grow branches. Choose one to see its turns and what the "
        "model would see on it.",
        "編集や再生成で枝が分かれます。枝を選ぶと、そのターンとモデルに見える内容を表示します。",
    ),
    "messages_span": ("messages #{first} to #{last}", "メッセージ #{first}〜#{last}"),
    "this_branch": ("shown now", "表示中"),
    "as_markdown": ("Markdown", "Markdown"),
    "as_openai": ("OpenAI messages (JSON)", "OpenAI メッセージ (JSON)"),
    "as_librechat": ("LibreChat import (JSON)", "LibreChat 取り込み用 (JSON)"),
    "forget_conversation_title": ("Forget this conversation?", "この会話を削除しますか"),
    "forget_conversation_hint": (
        "All its branches, summaries and the model's cache of it are deleted, down to the bytes in "
        "the file. This cannot be undone. The chat UI keeps its own copy.",
        "すべての枝、要約、モデルのキャッシュを、ファイル内のデータごと削除します。元に戻せません。"
        "チャット画面側の控えは残ります。",
    ),
    "forget_all_title": ("Forget everything?", "すべて削除しますか"),
    "forget_all_hint": (
        "All {n} conversations of this owner, with everything made from them, are deleted, down to "
        "the bytes in the file. This cannot be undone.",
        "この所有者の会話 {n} 件と、そこから作られたすべてを、ファイル内のデータごと削除します。元に戻せません。",
    ),
    "forget_yes": ("Yes, forget it", "はい、削除します"),
    "cancel": ("Keep it", "残します"),
    "forgotten": ("Forgotten: {n} messages.", "{n} 件のメッセージを削除しました。"),
    "forgotten_1": ("Forgotten: 1 message.", "メッセージを 1 件削除しました。"),
    "forget_conversation": ("Forget this conversation", "この会話を削除"),
    "forget_message": ("Forget this message", "このメッセージを削除"),
    "forget_message_title": ("Forget this message?", "このメッセージを削除しますか"),
    "forget_message_hint": (
        "Its text is deleted, down to the bytes in the file, and every summary that tells of it. The "
        "chat goes on around it, and when the chat UI sends the text again the model does not see "
        "it. What others said of it stays. This cannot be undone.",
        "本文と、それを含むすべての要約を、ファイル内のデータごと削除します。会話は続けられ、"
        "チャット画面が再び送ってもモデルには見えません。他の発言での言及は残ります。元に戻せません。",
    ),
    "import_title": ("Import chats", "会話の取り込み"),
    "import_hint": (
        "An export of LibreChat or ChatGPT, or OpenAI messages, as JSON. Every branch is kept. "
        "Nothing is sent to the model until a chat goes on.",
        "LibreChat、ChatGPT の書き出し、または OpenAI メッセージの JSON です。すべての枝を取り込みます。"
        "会話が続くまでモデルには何も送りません。",
    ),
    "import_file": ("File", "ファイル"),
    "import_do": ("Import", "取り込む"),
    "imported": (
        "Imported: {conversations} conversations, {messages} messages.",
        "会話 {conversations} 件、メッセージ {messages} 件を取り込みました。",
    ),
    "correct": ("Correct this summary", "この要約を修正"),
    "correct_hint": (
        "Your text takes its place; the old one stays in the history. The model reads the new "
        "context in the background.",
        "入力した文が代わりに使われ、元の要約は履歴に残ります。新しい内容はモデルが裏で読み込みます。",
    ),
    "correct_do": ("Put it in place", "置き換える"),
    "again": ("Try a policy", "方針を試す"),
    "again_title": ("Summarise again under another policy", "別の方針で要約し直す"),
    "again_hint": (
        "The model writes the same stretch of the chat again, in the background and behind every "
        "chat. The conversation goes on as it is until you put the new summaries in place. What "
        "is in use is kept in the history.",
        "同じ範囲の要約を、会話の邪魔をせず裏で書き直します。採用するまで会話は今のまま続き、"
        "使用中の要約は採用後も履歴に残ります。",
    ),
    "again_nothing": (
        "No summary is in use yet, so there is nothing to compare with.",
        "使用中の要約がまだないため、比べる相手がありません。",
    ),
    "again_policy": ("Policy", "方針"),
    "again_option": (
        "{name}: {summary} tokens a summary, blocks up to {block}, {method}",
        "{name}: 要約 {summary} トークン、範囲 {block} まで、{method}",
    ),
    "again_newest": (
        "How many of the newest summaries in use ({n} in all)",
        "新しい方から何件の要約を対象にするか（使用中 {n} 件）",
    ),
    "again_knobs": ("Change some of its knobs", "一部の設定を変える"),
    "again_knobs_hint": (
        "What is left empty stays as the policy says. Lengths are a share of the window up to 1.0, "
        "or a number of tokens above.",
        "空欄は方針のままです。長さは 1.0 以下なら窓に対する割合、それを超えるとトークン数です。",
    ),
    "knob_summary": ("Length of one summary", "要約 1 件の長さ"),
    "knob_block": ("Most source text of one summary", "要約 1 件が受け持つ原文の上限"),
    "knob_summaries": ("Budget of all summaries", "要約全体の上限"),
    "knob_method": ("Made by", "作り方"),
    "knob_ask_on": ("Asked for", "頼み方"),
    "knob_merge_from": ("Merged from", "統合の元"),
    "knob_language": ("Language", "言語"),
    "knob_prompt": ("Your own words to ask for it", "要約を頼む文"),
    "choice_model": ("the model", "モデル"),
    "choice_extractive": ("sentences of the chat", "会話の文を抜粋"),
    "choice_cached": ("behind the chat's own context", "会話の文脈に続けて"),
    "choice_fresh": ("with a prompt of its own", "独立したプロンプトで"),
    "choice_originals": ("the turns", "元のターン"),
    "choice_summaries": ("the two summaries", "2 件の要約"),
    "as_policy": ("as the policy says", "方針のまま"),
    "again_do": ("Summarise again", "要約し直す"),
    "again_sets": ("Written so far", "書き直したもの"),
    "again_state_waiting": ("waits", "待機中"),
    "again_state_running": ("being written", "作成中"),
    "again_state_stopped": ("stopped", "中断"),
    "again_state_done": ("ready to compare", "比較できます"),
    "again_state_used": ("in use", "採用済み"),
    "again_against": (
        "Other than in the configured policy ({name}):",
        "設定の方針（{name}）との違い:",
    ),
    "again_runs": (
        "{done} of {of} messages are summarised, in {n} summaries so far.",
        "{of} 件中 {done} 件のメッセージを要約済み（要約 {n} 件）。",
    ),
    "again_waits": (
        "{done} of {of} messages are summarised; it goes on when the chats leave time for it.",
        "{of} 件中 {done} 件のメッセージを要約済み。会話の合間に続けます。",
    ),
    "again_stopped": (
        "It was stopped before its end. What is written so far is kept.",
        "途中で中断しました。書けた分は残っています。",
    ),
    "again_reload": ("Look again", "更新"),
    "again_stop": ("Stop", "中断する"),
    "again_go": ("Go on", "続ける"),
    "again_use": ("Use these", "こちらを使う"),
    "again_undo": ("Put the old ones back", "元の要約に戻す"),
    "again_discard": ("Discard", "破棄する"),
    "again_use_hint": (
        "They take the place of the others as soon as the model has read them, in the background. "
        "The others stay in the history. Later compactions go by the policy of the configuration "
        "({name}).",
        "モデルが裏で読み込み終えると置き換わります。元の要約は履歴に残ります。"
        "以後の要約は設定の方針（{name}）で作られます。",
    ),
    "again_used": (
        "These were put in place at {when}. They are used once the model has read them.",
        "{when} に採用しました。モデルが読み込み終えると使われます。",
    ),
    "again_gone": (
        "What stood here when these were written is gone; there is nothing to compare with.",
        "書き直した時の要約がなくなったため、比較できません。",
    ),
    "side_left": ("Until now", "これまで"),
    "side_right": ("Again: {name}", "書き直し: {name}"),
    "compared": ("Side by side", "比較"),
    "compared_hint": (
        "Names, numbers, dates and instructions of the chat that can still be read in the "
        "summaries: a lower bound, for what is said in other words is not found.",
        "会話中の名前・数値・日付・指示のうち、要約の中でまだ読めるものです。"
        "言い換えは数えないため下限値です。",
    ),
    "row_summaries": ("summaries", "要約"),
    "row_tokens": ("tokens", "トークン"),
    "row_by_model": ("written by the model, checks passed", "モデルの文が検査に合格"),
    "row_seconds": ("seconds to write", "作成秒数"),
    "row_kept": ("kept in all", "保持（全体）"),
    "kind_names": ("names", "名前"),
    "kind_numbers": ("numbers", "数値"),
    "kind_dates": ("dates", "日付"),
    "kind_identifiers": ("identifiers", "識別子"),
    "kind_instructions": ("instructions", "指示"),
    "only_here": ("Only here", "こちらにだけある"),
    "and_more": ("and {n} more", "他 {n} 件"),
    "in_neither": ("In neither of them: {n}", "どちらにもない: {n} 件"),
    "kept_here": ("keeps {kept} of {of}", "{of} 件中 {kept} 件を保持"),
    "pin_title": ("Pinned facts", "固定した事実"),
    "pin_hint": (
        "What stands here is in every context of this conversation, right behind the system prompt.",
        "ここに書いたことは、この会話のすべての文脈でシステムプロンプトの直後に置かれます。",
    ),
    "pin_do": ("Pin", "固定する"),
    "pin_text": ("A fact to keep", "残したい事実"),
    "unpin": ("Unpin", "固定を外す"),
    "login_hint": (
        "The pages show what was said under one API key.",
        "1 つの API キーの下で話された内容を表示します。",
    ),
    "key": ("API key", "API キー"),
    "user_id": ("User id (optional)", "利用者 ID（任意）"),
    "user_id_hint": (
        "LibreChat sends one with each request; an owner's name from `chatfold inspect owners` will "
        "do too.",
        "LibreChat が毎回送る ID です。`chatfold inspect owners` の所有者名でも構いません。",
    ),
    "login_failed": ("This key does not open anything here.", "このキーでは開けません。"),
    "error": ("This did not work", "うまくいきませんでした"),
    "not_found": ("There is nothing here.", "ここには何もありません。"),
    "inspect_off": (
        "The pages are switched off (`inspect` in the configuration).",
        "ページは無効になっています（設定の `inspect`）。",
    ),
    "no_key_set": (
        "The pages need an API key, and none is set: `api_key` in the configuration.",
        "ページには API キーが必要ですが、設定されていません（設定の `api_key`）。",
    ),
    "not_local": (
        "Without an API key the pages are for this machine alone. Set `api_key` to use them from "
        "elsewhere.",
        "API キーなしでは、このマシンからのみ見られます。他から使うには `api_key` を設定してください。",
    ),
    "wrong_host": (
        "Without an API key the pages answer to localhost and 127.0.0.1 only.",
        "API キーなしでは、localhost と 127.0.0.1 の名前でのみ応答します。",
    ),
    "foreign_act": (
        "This did not come from a page of chatfold's own, or that page is too old: open it again.",
        "chatfold のページからの操作ではないか、ページが古すぎます。開き直してください。",
    ),
    "back": ("Back to the conversations", "会話の一覧へ戻る"),
    "live_title": ("What chatfold is doing", "稼働状況"),
    "live_running": ("Running", "実行中"),
    "live_waiting": ("Waiting", "待機中"),
    "live_background": ("Background", "裏の作業"),
    "live_background_now": (
        "{running} running, {pending} waiting",
        "実行 {running}、待ち {pending}",
    ),
    "live_progress": ("Your chats, in the background", "あなたの会話の裏の作業"),
    "progress_warming": ("reading the next context", "次の文脈の読み込み"),
    "progress_summarising": ("summarising", "要約"),
    "progress_messages": (
        "summarising messages {first}-{last}",
        "メッセージ {first}〜{last} の要約",
    ),
    "progress_waits": ("{what}: waits for the model", "{what}: モデルの空き待ち"),
    "progress_reads": (
        "{what}: {read} of {of} tokens read",
        "{what}: {of} トークン中 {read} を読み込み済み",
    ),
    "progress_writes": (
        "{what}: {of} of {of} tokens read, {written} of {most} written",
        "{what}: {of} トークンを読み込み済み、{most} トークン中 {written} を作成済み",
    ),
    "live_cells": ("KV cells in use", "使用中の KV セル"),
    "live_sequences": ("Sequences", "系列"),
    "live_snapshots": ("Snapshots on disk", "ディスク上の控え"),
    "live_engine": ("Model", "モデル"),
    "live_store": ("Store", "保存先"),
    "live_hint": ("Changes show by themselves.", "変化は自動的に反映されます。"),
    "live_lost": ("The connection was lost; trying again.", "接続が切れました。再接続しています。"),
    "chat_class": ("chats", "会話"),
    "side_class": ("titles and the like", "題名など"),
    "background_class": ("summaries", "要約"),
    "language": ("Language", "言語"),
    "page": ("Page {n} of {of}", "{of} ページ中 {n} ページ"),
    "speed": ("Per turn", "ターンごとの数値"),
    "speed_hint": (
        "Tokens of each answered request: evaluated, taken from the cache, generated; and the time "
        "to the first token.",
        "応答ごとのトークン数（評価・キャッシュ・生成）と、最初のトークンまでの時間です。",
    ),
    "evaluated": ("evaluated", "評価"),
    "cached": ("from the cache", "キャッシュ"),
    "generated": ("generated", "生成"),
    "first_token": ("time to first token", "最初のトークンまで"),
    "seen_at": ("What the model saw at turn {n}", "ターン {n} でモデルに見えた内容"),
    "seen_link": ("What the model saw", "モデルに見えた内容"),
    "seen_exact": (
        "Built again from what is stored, and equal to what was sent, to the last character.",
        "保存内容から組み立て直し、実際に送った内容と一字一句一致しました。",
    ),
    "seen_differs": (
        "What was sent can no longer be shown word for word: something of it was changed or "
        "forgotten since. This is what it would be now.",
        "その後の変更や削除のため、送った内容をそのまま再現できません。現在の内容で組み立てています。",
    ),
    "seen_unknown": (
        "How this turn was put together was not recorded.",
        "このターンの組み立ては記録されていません。",
    ),
    "piece_new": ("new", "追加"),
    "n_new": ("{n} new", "追加 {n}"),
    "n_gone": ("{n} gone", "削除 {n}"),
    "to_change": ("Show the first one", "最初の変化へ"),
    "piece_gone": ("gone", "削除"),
    "against_before": ("What changed against the turn before", "前のターンからの変化"),
}

WORDS: Mapping[str, Mapping[str, str]] = {
    ENGLISH: {name: words[0] for name, words in _WORDS.items()},
    JAPANESE: {name: words[1] for name, words in _WORDS.items()},
}


def language_of(*, chosen: str, accepted: str) -> str:
    """A language that we have: the one chosen, else the one the browser likes best."""
    if chosen in LANGUAGES:
        return chosen
    weighed = []
    for place, part in enumerate(accepted.split(",")[:32]):
        name, _, parameters = part.partition(";")
        quality = re.fullmatch(r"\s*q=([01](?:\.\d{0,3})?)\s*", parameters)
        language = name.strip().lower().partition("-")[0]
        if language in LANGUAGES:
            weighed.append((-float(quality[1]) if quality else -1.0, place, language))
    best = min(weighed, default=(0.0, 0, ENGLISH))
    return best[2] if best[0] < 0 else ENGLISH


def teller(language: str) -> Callable[..., str]:
    """`t(name, n=3)`: the words with the values in their places, numbers grouped in thousands. One
    of a thing has words of its own where there is a `name_1`."""
    words = WORDS[language]

    def tell(word: str, /, **values: Any) -> str:
        shown = {k: f"{v:,}" if isinstance(v, int) else v for k, v in values.items()}
        one = words.get(f"{word}_1") if values.get("n") == 1 else None
        return (one or words[word]).format(**shown)

    return tell
